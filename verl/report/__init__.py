"""`verl report`: one HTML file about one or more runs, from the files in their directories.

    run.py       reads a run, in whatever state it is
    panels.py    which curves are shown, and how they are read; curves.py draws them
    stages.py, layers.py, timeline.py    the other figures; style.py is how all of them look
    summary.py, samples.py, settings.py  numbers at the top, best and worst samples, configs
    page.py      puts everything into page.html.j2

Nothing here imports torch, Ray or vLLM.
"""
