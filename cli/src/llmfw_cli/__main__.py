"""`python -m llmfw_cli`: the command line where the script `llmfw` is not on the path."""

from llmfw_cli.app import main

if __name__ == "__main__":
    main()
