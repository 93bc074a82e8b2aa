"""Loading, merging, saving and exporting the model of a job."""
