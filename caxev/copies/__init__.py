"""What becomes of copies: which of them agree, which share their files, and when one may go."""
