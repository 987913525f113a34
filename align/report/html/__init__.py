"""`align report`: one HTML file that tells what a run did, whether it worked, and what it cost."""
