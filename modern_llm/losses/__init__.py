"""Losses as pure functions of tensors: label shift, token log-probs through the output projection, preference losses."""
