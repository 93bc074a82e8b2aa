"""Complete states of trainings on disk: written whole, checked by hash, loaded in place.

A checkpoint is a directory of plain files, one format for one and for many processes:

| file | content |
|---|---|
| `tensors/` | `torch.distributed.checkpoint`: trained weights, optimizer state, by name |
| `values.pt` | `torch.save` of numbers, texts and small tensors; loads with `weights_only=True` |
| `manifest.json` | the step, and size and SHA-256 of each file; written last |
"""
