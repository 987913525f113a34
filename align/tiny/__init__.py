"""A small invented world in which every stage of post-training can be judged exactly."""
