"""From two half-maps to a sharpened map and honest figures: FSC, masks, B-factor, local and directional resolution."""
