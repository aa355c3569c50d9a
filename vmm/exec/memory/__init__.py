"""Guest RAM of traced processes: made shared where it is private (remap, copying), seen by us (backing, views, maps, watch),
copied where it cannot be (mirror), and never the end of us (sigbus). `ram.Ram` is what the others use.
"""
