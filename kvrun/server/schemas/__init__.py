"""What bodies hold: one file per dialect; these classes are the OpenAPI document."""
