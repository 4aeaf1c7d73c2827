"""What a run has to show for itself."""
