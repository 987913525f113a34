"""The checkout's door: `accelerate launch cli.py sft --recipe R`, `torchrun cli.py sft ...`."""

from align.cli import main

if __name__ == "__main__":
    main()
