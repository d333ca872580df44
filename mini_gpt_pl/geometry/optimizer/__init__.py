"""What an optimizer's settings and state say about its updates."""
