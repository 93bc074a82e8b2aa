"""AdamW's arithmetic on blocks of tensors, and the precision it runs in."""
