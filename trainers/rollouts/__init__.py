"""How answers are made: from merged weights, as many at once as fit, with images, greedily in evaluation."""
