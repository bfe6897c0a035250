"""The pages of docs/measured, and README's table, made from benchmarks/results: no figure is typed by hand."""
