"""What a run's files say, as figures and one page: reading, arithmetic, drawing, HTML."""
