"""For plugin authors: fakes for every seam, and the contract classes of the conformance kit."""
