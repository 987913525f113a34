"""Rows of any form become messages, pairs or prompts, and these become token ids and loss masks."""
