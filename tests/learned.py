"""What of a row a stage learns, as text."""


def learned(tokenizer, row) -> str:
    """The text of the tokens in the loss."""
    return tokenizer.decode([label for label in row["labels"] if label != -100])
