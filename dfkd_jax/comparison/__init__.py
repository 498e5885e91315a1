"""Many runs: child processes, tables, figures and the page."""
