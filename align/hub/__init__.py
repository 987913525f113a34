"""The Hub: what may leave this machine, the model card, the upload."""
