"""What all benches share: the session that checks and measures, ceilings, provenance, results."""
