"""What was measured, as one page that a person looks at: JSON in, plots and HTML out."""
