"""The command line of a checkout: `python cli.py ...` is the installed command `mini_gpt_pl`."""

from mini_gpt_pl.main import main

if __name__ == "__main__":
    main()
