"""The demo in a browser: `sa2va-i demo`, and the Space (`hub_cards/space`)."""
