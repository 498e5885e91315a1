"""Many runs against each other: `child_process` runs them, `run_folders` reads them back.

`tables`, `figures`, `ablation_figure` and `report_page` show them; `statistics` has the intervals.
"""
