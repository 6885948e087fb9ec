"""Wrong input: tables of what comes in and what must be said, and right files made wrong at random."""
