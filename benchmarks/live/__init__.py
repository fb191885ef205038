"""Real processes of ours and of hivemind's side by side, for round.py."""
