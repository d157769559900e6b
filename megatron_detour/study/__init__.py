"""Studies: arms of pretraining compared by criteria that are set before the results."""
