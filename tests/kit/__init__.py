"""The fixture kit: what tests of several folders share."""
