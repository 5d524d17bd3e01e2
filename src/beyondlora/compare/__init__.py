"""A fair comparison of methods on one task: a grid of runs, statistics, and a page that shows them.

comparison.py  from a grid to its report
grid.py        the YAML: which runs there are
held_out.py    the rows that nothing is chosen on: cut off first, and checked against validation
runs.py        the runs: side by side, killed and continued, one line each in results.jsonl
metrics.py     figures out of what every test row came to
statistics.py  difference, interval, verdict; pure, no file and no model
arms.py        which learning rate each method gets, and what it then shows
words.py       the terminal's table, Markdown, and PEFT's own result format
pictures.py    four pictures
report.py      one page
"""

from .comparison import compare as compare
