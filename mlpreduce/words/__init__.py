"""How things are written, typed and shown: values, steps, addresses, tables, HTML, progress, and complaints on settings."""
