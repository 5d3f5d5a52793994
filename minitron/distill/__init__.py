"""Teacher-student training: the loop (rhythm), the pair (mathematics of one batch), the losses."""
