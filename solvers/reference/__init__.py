"""The exact models of the field, solved by OR-tools: Checkmate and MOCCASIN."""
