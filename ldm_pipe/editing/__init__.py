"""Editing: what starts from a picture and keeps a part of it."""
