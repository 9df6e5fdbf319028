"""Thin wrappers of the packages and formulations that race against ours; each imports its package when it
is built.
"""
