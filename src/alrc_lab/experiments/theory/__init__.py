"""The theory of clipping on trial: experiments E0 to E7, each a file, and the study that plans them.

Ramaswamy 2023 says that clipped gradient descent is stable and where it converges. Every experiment asks one part of
that of the rules in `alrc.rules`, for many seeds at once, with criteria that stand in its configuration before it runs.
"""
