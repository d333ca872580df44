"""Every logged name: its words, formula, unit, format, null, cost and panel."""
