"""The timeline of a run: `spans` records the spans of every process, `reader` reads them."""
