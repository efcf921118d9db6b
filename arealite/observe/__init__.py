"""What a run shows and leaves behind: metrics, sampled text, plots."""
