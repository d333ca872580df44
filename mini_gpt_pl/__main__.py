"""`python -m mini_gpt_pl ...` is the installed command, for where its script is not on the path."""

from mini_gpt_pl.main import main

if __name__ == "__main__":
    main()
