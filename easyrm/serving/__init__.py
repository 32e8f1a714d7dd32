"""The scoring server: requests are checked, queued, computed together and answered."""
