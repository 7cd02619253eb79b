"""Other people's checkpoints and engines, in and out.  Nothing here is needed to run our own."""
