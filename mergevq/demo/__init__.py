"""The quickstart, its report and the demo page."""
