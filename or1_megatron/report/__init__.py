"""`or1 report`: what a run left behind as one page and one JSON file."""
