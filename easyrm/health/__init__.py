"""What easyrm.doctor looks at: each file is one thing that can be wrong with the machines of a run."""
