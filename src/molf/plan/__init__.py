"""What a training will cost, known from the model's configuration alone.

`plan_training` is the entry; importing this package needs neither torch nor transformers.
"""
