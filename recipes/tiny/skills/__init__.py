"""One file per group of skills; each lists its functions `Random -> list[Turn]` in `SKILLS`."""
