"""A pytest plugin: a scripted gateway and a whole deltawire for the tests of those who use it."""
