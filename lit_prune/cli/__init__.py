"""The command line: a light front, then LightningCLI with this project's manners."""
