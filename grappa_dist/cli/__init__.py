"""The command `grappa-dist`: a file for each verb, which reads the arguments, calls the package and prints."""
