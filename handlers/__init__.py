"""The reactions that come with caxev. They import its public names and never each other."""
