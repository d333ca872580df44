"""A recorded path as inner products: its principal directions, windows and nulls, and the rows behind them."""
